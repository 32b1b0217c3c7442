"""Playing policies in simulators, and what comes of it: results, comparisons, videos."""
