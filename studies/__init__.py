"""What was measured: each program prints the tables and pictures that it is the source of."""
