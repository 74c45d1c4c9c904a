"""The probe: does the second perspective help? Drawn pages with questions, arms on frozen features, and two studies."""
