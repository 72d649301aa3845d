"""Pure functions from arrays to arrays: what a Qwen computes, without parameters, configs or Flax."""
