"""Published run logs and run tables -> the one table of runs (`ingest.ingest`; pickles by `reader.load_pickle`)."""
