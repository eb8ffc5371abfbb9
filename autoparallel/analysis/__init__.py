"""What a finished plan takes: memory, time, communication, in numbers and closed forms."""
