"""What truestep gives to other tests: tiny pipelines, and a corpus of faults for gates."""
