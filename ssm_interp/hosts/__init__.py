"""Libraries that others look at models with, fed from our results. Each is imported when it is used."""
