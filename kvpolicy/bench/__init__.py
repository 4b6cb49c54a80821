"""Is it fast and lean: ratios within one run, against baselines and against the floor."""
