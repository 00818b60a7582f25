"""Device mesh, the exchange between tokens and experts, and operators built with their layout."""
