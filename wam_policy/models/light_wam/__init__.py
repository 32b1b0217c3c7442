"""Light-WAM: an adapted video expert with a regression head for actions."""
