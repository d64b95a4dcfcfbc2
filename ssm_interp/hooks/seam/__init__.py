"""Everything that touches a host's privates: how its calls reach us, and what its callers and caches know."""
