"""The evidence: this library beside what people use today, same work, same process, same run.

pytest bench             the tables for this machine, under 15 minutes on 2 cores (`--full`: bench/README.md's, hours)
python -m bench.table    bench/results/*.json -> the tables of the pages
"""
