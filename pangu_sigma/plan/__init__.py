"""What a configuration needs of a cluster, by arithmetic: no framework is imported, nothing is built."""
