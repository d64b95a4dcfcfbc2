"""What interventions do at one layer: edges, positions and features as masks, and one served operator call."""
