"""Starting a run in many processes: on this machine (local.py), and by files for Slurm, Kubernetes and TPU VMs."""
