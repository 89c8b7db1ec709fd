"""What a wrong stage would read, defect by defect."""
