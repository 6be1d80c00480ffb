"""Parts of decoding in this process: linear layers as a CPU reads them fastest, and the cache of keys and values."""
