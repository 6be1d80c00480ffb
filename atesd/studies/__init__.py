"""Studies: grids of runs, and the measurements that compare them."""
