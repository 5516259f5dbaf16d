"""What watches and steers a run from between its steps. They act in the order in which `app.cli` lists them."""
