"""The arithmetic of plans: what a forecast costs, which schedules are best, how weights improve."""
