"""What a user runs: training scripts, and the demo that puts them through an interruption."""
