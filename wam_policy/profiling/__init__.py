"""What a control step costs: time, operations, memory."""
