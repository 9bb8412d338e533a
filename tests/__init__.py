"""Tests of jobfetcher, on the real engine and real servers wherever there are any."""
