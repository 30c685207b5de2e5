"""Events of saves and loads, and the sinks that receive them."""
