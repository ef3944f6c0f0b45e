"""VideoFacts: generated videos whose every fact is known, questions about them, and a scorer without a judge."""
