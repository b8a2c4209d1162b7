"""The experiment of docs/results.md: arms, their runs, figures, tests and pictures."""
