"""What a run would hold and send in any number of processes, told without any of them."""
