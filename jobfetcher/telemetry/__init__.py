"""What is told to people: events, and the listeners that write them as log lines or progress bars."""
