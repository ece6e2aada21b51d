"""What is measured on what the stages made: tables with intervals."""
