"""Backend "cpp"'s C++ code, and the library that a compiler makes of it at the first use."""
