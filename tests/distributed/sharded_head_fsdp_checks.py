CHECKS = {2: {}, 4: {}}
