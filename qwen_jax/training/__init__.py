"""What every run shares: state, optimizer, the train step, programs, the loop, checkpoints, metrics, the workdir."""
