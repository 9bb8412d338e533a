"""What tests share: the real services they run against, and how to start them."""
