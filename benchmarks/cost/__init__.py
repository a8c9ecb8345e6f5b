"""What a step costs with Eva, in time, memory and network traffic, and in equations and instructions."""
