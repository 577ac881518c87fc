"""What is trained next, as data: curves, plans, paradigms, cost. Imports errors, fingerprint and files; no torch."""
