"""Checkpoints of Hugging Face models, into the trainer's and out of them."""
