"""Real facts that come with causalcone."""
