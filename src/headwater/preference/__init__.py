"""LASeR: preference training with several reward sources, one picked for each batch by a contextual bandit."""
