"""What a run will be made of and cost, before there is a machine to run it on."""
