"""The loop that runs programs, the denoisers it calls and the predictors it asks. Imports nothing by itself."""
