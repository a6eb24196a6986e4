"""How fast is it, against what? `python -m benchmarks --help`, and README.md beside this file."""
