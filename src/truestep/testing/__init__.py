"""What truestep gives to other tests: tiny pipelines."""
