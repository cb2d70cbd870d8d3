"""Makes the tiny checkpoints beside this file, and the logits that Hugging Face's own models have for them.

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers==5.23.0
    /tmp/hf/bin/python tests/train/huggingface/make.py

Each folder is what `save_pretrained` writes of a model with random parameters, and `golden.npz`: `tokens`
int32 [2, 40], rows that begin with the last id, and `logits` float32 [2, 40, 64], computed in float32 from the
parameters as they are stored. Made with torch 2.14.1 and transformers 5.23.0.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

VOCAB_SIZE = 64
SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=63, attn_implementation="eager",
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32)

MODELS = {
    "llama": (LlamaConfig(**SIZES, rms_norm_eps=1e-5), torch.float32),
    "llama3": (LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16, rope_parameters=LLAMA3), torch.bfloat16),
    "llama_linear": (LlamaConfig(**SIZES, rope_parameters=dict(rope_type="linear", factor=4.0)), torch.bfloat16),
    "mistral": (MistralConfig(**SIZES, head_dim=16, sliding_window=8), torch.bfloat16),
    "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=True), torch.float16),
    "qwen2_windows": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        torch.float32,
    ),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), torch.bfloat16),
    "qwen3_yarn": (Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN), torch.bfloat16),
}
SHARD_SIZES = {"qwen2_windows": "30KB"}


def main() -> None:
    """Writes the folders, over those that are there."""
    for number, (name, (config, dtype)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # Wide enough for gains, biases and positions to show in the logits.
                is_gain = "norm" in parameter_name
                parameter.copy_(torch.randn_like(parameter) * (0.3 if is_gain else 0.2) + (1.0 if is_gain else 0.0))
        tokens = np.random.default_rng(number).integers(0, VOCAB_SIZE - 1, (2, 40), dtype=np.int32)
        tokens[:, 0] = VOCAB_SIZE - 1
        folder = Path(__file__).parent / name
        model.to(dtype).save_pretrained(folder, max_shard_size=SHARD_SIZES.get(name, "5GB"))
        # Read again: `to` has rounded the frequencies of the rotary positions as well.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens).long()).logits.numpy()
        np.savez_compressed(folder / "golden.npz", tokens=tokens, logits=logits.astype(np.float32))
        print(name, float(np.abs(logits).mean()))


if __name__ == "__main__":
    main()
