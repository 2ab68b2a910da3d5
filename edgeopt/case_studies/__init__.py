"""Complete studies on real data: everything between a data set and a report, built from ordinary recipes."""
