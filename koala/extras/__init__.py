"""What the papers' experiments need and the suite itself does not: adversarial training, FID, released networks."""
