"""`dsnet bench`: what dense shortcuts cost, side by side in one process. `benchmarks/README.md` says how to read it."""
