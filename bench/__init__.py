"""The evidence: this library beside what people use today, same work, same process, same run.

pytest bench             the tables for this machine, in under 15 minutes on 2 cores (`--full`: every shape)
python -m bench.table    bench/results/*.json -> the tables of README.md
"""
