"""Arrays in, arrays out; knows no mesh."""
