"""The sections of `benchmarks.gpu`, each a module with ``jobs``, and the processes that they run in."""
