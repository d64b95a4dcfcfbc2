"""Many variants as rows of one step, or by full forwards: `answers` is the only door."""
