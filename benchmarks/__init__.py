"""Benchmarks of dualview against everything else that does the same work.

`python -m benchmarks` measures, `pytest benchmarks --benchmark-only` runs the same cases under pytest-benchmark. One
idea a file: `cases` says what is compared, `peers` with what, `work` counts what has to be done, `measure` measures,
`children` does so in processes of their own, `runner` brings them together, `results` is the form of the JSON, `report`
makes tables and plots of it.
"""
