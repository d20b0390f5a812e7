"""What more machines than there are would do: computed, not measured."""
