"""What every backend keeps alike."""
