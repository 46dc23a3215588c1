"""What a run would need, told before it runs."""
